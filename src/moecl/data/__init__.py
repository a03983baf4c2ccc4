"""Task streams: rows, token batches, bundled benchmarks and the files that are fetched for them."""
