"""Data sets: what is taken of each image, the store it goes into, and who does the work.

From top to bottom, an import may only point down:

    read         a store that is read
    extract      a run from beginning to end, or from where one stopped
    ray_engine   who does the work on a cluster: actors, among which Ray Data shares it out
    ray_session  Ray itself, connected to and left
    engines      who does the work: this process, a thread of which writes
    ranks        processes of one run, as torchrun starts them
    plan         what a run is, and how it is laid out
    work         what a worker does: images of blocks, the model, whole blocks
    taking       what is done with a batch
    geometry     where tokens lie, in plain values
    quantities   what can be asked of each image
    batches      images, read ahead by other processes
    inputs       images as a model is shown them
    data_sets    images that a data set of torch makes
    sources      where images come from: folders, lists, archives, tables, data sets by name
    manifest     what a run is, in plain values; how two differ
    sent_errors  errors, as another process is sent them
    writer       a thread that writes
    store        arrays of Zarr v3
    gone         its files that are not there any more
    answers      errors while it is read or written, in words that say what to do
    layout       its arrays, blocks of images, and values as they are stored
    locks        one run at a time
    clients      of stores at addresses: which it takes, and what their errors mean
"""

from __future__ import annotations

from .extract import Summary, extract
from .quantities import QUANTITIES, Quantity
from .ray_engine import RayEngine
from .read import Run
from .read import open_run as open  # noqa: A004

__all__ = ["QUANTITIES", "Quantity", "RayEngine", "Run", "Summary", "extract", "open"]
