"""The parsers: one module a command, each with a `parse(argv)` that finds wrong flags and missing files at once."""
