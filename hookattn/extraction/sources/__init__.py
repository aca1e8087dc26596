"""Where images come from.

From top to bottom, an import may only point down:

    open_images  what somebody typed, opened as images in a fixed order
    named        data sets of Hugging Face, by name or as they were saved
    tables       Parquet files with a column of images
    shards       tar archives, as WebDataset has them
    folders      photos in folders, in files, and in lists of files
    hub          of Hugging Face: whether it answers, and what its refusals mean
    columns      of tables: which holds the images and which the labels, and what rows are called
    places       paths and remote addresses: what is there, and the bytes of it
    images       the base of all sources: names, labels, and the bytes of each
"""
