"""What a run left on the disk, as a person reads it: a page for the browser and a few lines for the terminal.

Loads without torch. It must not know how a run is trained or scored, only the files that are written about it.
"""
