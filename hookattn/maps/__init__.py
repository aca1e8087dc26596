"""From a captured call to numbers: maps, their gradients, and the module's own forward run again.

From top to bottom, an import may only point down:

    store          maps in a file, and back
    tensor_file    named tensors in a file, written one at a time, read lazily
    together       the row of a query in several maps, read together
    attention_map  AttentionMap, read when it is sliced
    outputs        what multiplies the values, and what each head adds to the output of its module
    vectors        queries, keys and values of a map
    rows           some rows of a map without the others
    labelled       a map as an array of xarray
    reading        where a map comes from: a captured call, by recipe or by replay; a tensor that was kept
    specs          shape, dtype and device of maps that are not computed, remembered by sizes
    comparison     whether a map is the one that its module's output came from
    notebook       a map, and a list of maps, as a notebook shows them
    picture        what a query attends to, laid out on the image
    gradient       dL/dA: what backward brings to a module's output, carried on to its map
    pickled        which version has pickled a map
    lazy           what is computed when it is sliced, a chunk of rows at a time
    as_array       what torch, numpy and others do with a map as if it were a tensor
    transfer       from a GPU to the CPU
    fed            which places of an output the queries of a map feed
    forward        a forward that is run to show what multiplies its values, and what comes out
    carried        which products carry a map to the output of its module, and where its rows are in them
    replay         run a module's own forward again, watching or replacing the map it forms
    established    where the map of a call stands in its forward: as its recipe has it, or as evidence has established it
    evidence       axes by evidence: what multiplies the values, and which place of the output each row of it feeds
    products       where a map meets its values: watched, or with something else in place of what comes out
    norms          norms that a forward calls, as what is linear in them and what they divide by
    sites          where a forward forms its map: watched, filled, or differentiated by
    intercept      the one mode that sees or replaces what a forward forms
    formed         a call of SDPA, a softmax or a factor of a product, with the rows that stand in it
    arrangement    from rows in a module's own order to a map and back
"""
