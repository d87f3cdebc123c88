"""The presets, one file each, found by their names: `sake-counterfact` stands in `sake_counterfact.py` as `PRESET`."""
