"""Mathematics that several families share, beside distributions."""
