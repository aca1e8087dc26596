"""Conditions a model runs under that the path from a hook to a map need not know: one file each.

From top to bottom, an import may only point down:

    frames       which call of a model is on the stack, also when it was interrupted
    checkpoints  activation checkpoints run a module again in backward
    threads      a recorder sees the thread and the asyncio task that opened it
    compiled     compiled code runs eagerly meanwhile, or on graphs that call hooks; exports and traces are left alone
    graphs       compiled graphs that call hooks
    wrappers     DDP and FSDP are looked through; DataParallel, scripted and exported models refused
    sharding     FSDP and tensor parallelism: parameters that are not to be had
    function_modes  modes of the user's, in force again when a call is read
    dispatch_modes  what a hook of ours runs is invisible to dispatch modes that are on
    transforms   torch.func: tensors that are gone when the transform has returned
    training     train mode: the random streams that dropout draws from
    autocast     mixed precision
    devices      a model, and what it is called with, that lie apart
    meta         what has shapes and no values
    changes      what tells that a tensor has changed since the forward
    samples      some values of parameters, which are part of that
    cuda_graphs  nothing is waited for while a CUDA graph is captured
    modules      the modules of a model by name
    setting      a context variable that has another value for a while
"""
