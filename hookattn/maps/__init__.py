"""From a captured call to numbers: maps, their gradients, and the module's own forward run again.

From top to bottom, an import may only point down:

    attention_map  AttentionMap, read when it is sliced
    reading        where a map comes from: a captured call, by recipe or by replay; a tensor that was kept
    picture        what a query attends to, laid out on the image
    gradient       dL/dA: what backward brings to a module's output, carried on to its map
    lazy           what is computed when it is sliced, a chunk of rows at a time
    replay         run a module's own forward again, watching or replacing the map it forms
    sites          where a forward forms its map: watched, filled, or differentiated by
    intercept      the one mode that sees or replaces what a forward forms
    axes           how modules fold the axes of their maps
    evidence       axes by evidence: what multiplies the values, and which place of the output each row of it feeds
"""
