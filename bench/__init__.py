"""Published numbers and how to get them again: `python -m bench NAME [--quick] [--json FILE]`.

Each benchmark is a module or folder of this package with a `run(options) -> Result`. A result names the machine and the commit,
holds the rows, and states claims: a value, the bar it is held against, and whether it holds.
"""
