"""Data sets: what is taken of each image, the store it goes into, and who does the work.

From top to bottom, an import may only point down:

    sources      where images come from: folders, lists, archives, tables, data sets by name
"""
