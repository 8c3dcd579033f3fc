"""The YAML that ships with mmgrpo: method presets, quickstart runs and runs on real models.

Installed as ``mmgrpo.configs``; files are found by scanning the folders, never by a table.
"""
