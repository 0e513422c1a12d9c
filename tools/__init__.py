"""Tools of those who make setflow; from a checkout, in no wheel."""
