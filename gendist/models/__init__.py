"""The families: one file each, which holds the mathematics and nothing of where it runs."""
