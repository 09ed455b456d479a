"""The columns of a sample beside its features: of its class, of sequences of their states, and of what a row is."""

LABEL, STATE, SEQUENCE, STEP = "label", "state", "sequence", "step"
