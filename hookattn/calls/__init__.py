"""One captured call: the module, its arguments, its modes, and whether it is still fresh.

From top to bottom, an import may only point down:

    call         a call of an attention module, and the modes it is resumed in
    layer        an attention module of a model, and what has to be looked at each time it is called
    staleness    what tells that a module is another one than it was
    hooks        what a recorder puts on somebody else's modules
    copies       what a copy of a module does without
    restore      put a module back as it was
    callsite     who calls an attention module, and what x is
    arguments    what a module was called with, as it is kept
"""
