"""Tables of configs: run each row with several seeds and report them all. `python -m focal_plugin ablation`"""
