"""What every cell needs at run time: errors, the event loop, lean imports, fault points. Imports nothing of ours."""
