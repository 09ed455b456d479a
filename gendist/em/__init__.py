"""One engine for everything that is fitted by sufficient statistics. It knows no family and not where blocks are."""
