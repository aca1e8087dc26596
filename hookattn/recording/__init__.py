"""What touches a running model between `with` and the end of the block, and leaves it as it was.

From top to bottom, an import may only point down:

    inspection   what of a model can be read, how, and who calls it
    recorder     AttentionRecorder
    detect       which modules form maps, where names do not tell
    record       the hooks that keep what each attention module was called with
    stay_compiled  which compiled models stay so, on graphs that call the hooks
    keep_maps    maps made while a module runs, of the queries and keys it makes itself
    buffers      memory of maps that nobody holds any more
    follow       gradients that are followed through backward
    stems        hooks that note images, how they are cut, and what blocks of windows are given
    edits        other maps in place of a module's own
    lent_maps    maps that are lent to a function, as long as their call is at hand, and when
    wanted       what a recorder was told to keep
    reduce       what a function makes of maps while the model runs, in place of them
    hear         what is made of a call as soon as its module's own layers have made what it needs
    passes       what counts as one forward, and its maps
    saving       base of the recorder: its maps into a file
    maps         the maps of one forward: those that can be read, and why the others cannot
    selection    which modules are attention, and what `layers=` means
"""
