"""Axes by evidence: which product of a forward multiplies its values, and which place of the output each row of it feeds.

Nothing is looked up by name and no shape is trusted: everything comes from derivatives of the module's own forward. From top to
bottom, an import may only point down:

    establish  from a module and a call to the arrangement of its map, or the reason why there is none
    locate     where the rows of products stand among what functions of PyTorch form
    unmix      a softmax that is mixed over its heads before it multiplies
    table      rows of the products arranged as (images * windows, heads, queries, keys)
    judge      which product is a map: each row feeds one place, each column carries another token
    probe      derivatives: what a row feeds, what a column depends on
    product    two activations that are multiplied, as matrices
    tape       a forward as the list of aten operations it is, which can be run again with something else in it
    values     those that it is taken down with: of the call, moved a little, or others where they are no numbers
    seen       what functions of PyTorch show of it: softmaxes, factors of products, and the operations they are
"""
