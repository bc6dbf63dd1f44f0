"""Independent items of work, here or elsewhere: `arguments.py` says where, `launchers.py` starts them there."""
