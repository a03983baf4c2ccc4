"""`moecl fetch` and `moecl cache`: parse, call, print."""

import json
from typing import Annotated

import typer
from rich.console import Console

from moecl._sizes import size
from moecl.cli_options import AsJson
from moecl.errors import AssetError, near
from moecl.terminal import Command, watched

EXAMPLES = "moecl fetch\nmoecl fetch smollm2-135m-instruct"

app = typer.Typer(help="What was fetched, and where it is.")
err = Console(stderr=True)


def fetch(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Assets to fetch; default all that there are.")
    ] = None,
) -> None:
    """Fetch models and data ahead.

    For a machine that will have no network: the cache may be copied to it. MOECL_CACHE names another folder for it.
    """
    from moecl.data.assets import ASSETS
    from moecl.data.assets import fetch as fetch_asset

    for name in names or ASSETS:
        with watched(err) as watching:
            path = fetch_asset(name, watching.fetching)
        print(f"{name}: {path}")


@app.command("list", cls=Command, epilog="moecl cache list")
def cache_list(as_json: AsJson = False) -> None:
    """List what is in the cache.

    Beside assets: `tokens`, `prefix` and `features`, your texts as tokens, as what a base's frozen lower layers give
    for them, and as what the router reads of them.
    """
    from moecl.data import derived
    from moecl.data.assets import cache_dir, cached
    from moecl.show import say

    found = [(it.name, it.path, it.bytes, f"{it.when.astimezone():%Y-%m-%d %H:%M}") for it in cached()]
    for kind in derived.KINDS:
        path, entries, taken = derived.taken(kind)
        found += [(kind, path, taken, f"{entries} entries")] if entries else []
    if as_json:
        print(json.dumps([{"name": name, "path": str(path), "bytes": taken} for name, path, taken, _ in found]))
        return
    for name, path, taken, more in found:
        print(f"{name}  {size(taken)}  {more}  {path}")
    if not found:
        say(err, f"nothing in {cache_dir()}; `moecl fetch` fills it")


@app.command("clear", cls=Command, epilog="moecl cache clear\nmoecl cache clear prefix")
def cache_clear(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Only these.")] = None,
) -> None:
    """Remove what is in the cache; it is fetched or computed again when needed.

    `features`, `tokens` and `prefix` derive from your texts: clear them where these must not stay on this machine.
    """
    from moecl.data import derived
    from moecl.data.assets import ASSETS, cache_dir, clear
    from moecl.show import say

    known = [*ASSETS, *derived.KINDS]
    if unknown := [name for name in names or () if name not in known]:
        raise AssetError(f"no asset {unknown[0]!r}{near(unknown[0], known)}; there are: {', '.join(known)}")
    wanted = names or known
    clear([name for name in wanted if name not in derived.KINDS])
    for kind in derived.KINDS:
        if kind in wanted:
            derived.clear(kind)
    say(err, f"cleared {', '.join(names) if names else 'all'} in {cache_dir()}")
