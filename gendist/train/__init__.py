"""ONE LOOP for everything that is fitted by gradient; it knows no family."""
