"""Tokens and the image they come from: grids, windows, prefix tokens.

From top to bottom, an import may only point down:

    geometry     what of a call outlives its tensors: sizes, images, the block that cuts windows
    trunk        how a model cuts its image into patches
    images       what a model looks at, found among its arguments
    sizes        how large a feature map is after convolutions and pools
    tokens       what an axis of a map stands for
"""
