"""The adapter: LoRA experts, the mixture in each FFN, the discriminator, and how they get into a base."""
