"""The mathematics of attention: what a map is computed from, and the only softmax.

From top to bottom, an import may only point down:

    contributed  how much of each key reaches each query
    weighted     what is computed from a map; sums of its heads
    sources      queries and keys, scores, or a map that is there already
    derived      what all that is computed from maps has
    softmax      the softmax of scores, in their place or beside them
    projection   queries and keys as projections by a module's layers
    projected    queries or keys that are computed when they are needed, cut to what is asked for before
    narrowing    cutting to some images, heads and tokens; what is done to each token by itself
    layers       layers that are a projection and nothing else
    packed       projections that one layer makes at once
    overheard    what a module's own layers put out while it runs
"""
