"""How good a model is, and what it makes of data: computed over blocks, wherever they are."""
