"""AttentionMap: one captured call, read when it is sliced."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from ..attention.sources import Source
from ..calls.call import Call
from ..calls.callsite import CallSite
from ..errors import HookattnError, RecorderError, StaleMapError, UnreadableError
from ..image.geometry import Geometry
from ..image.tokens import Query, Size, Tokens
from ..recipes.places import Places, find_tokens, name_axes, settle
from .comparison import Comparison, Difference, compare_runs, compare_with_output, saving_unseen
from .established import NotEstablishedError, reason_of
from .gradient import Gradient
from .labelled import Labelled
from .lazy import Delivery, Spec
from .notebook import describe_in_html
from .outputs import OfOutputs
from .pickled import reduce_to
from .picture import draw_rows, index_of_row
from .reading import Captured, Deferred, Kept, Loaded, Lost, Origin, Watched, keep_or_lose
from .sites import Watch


class AttentionMap(OfOutputs, Labelled):
    """The attention probabilities of one call of one module: (batch, head, query, key), before `attn_drop`.

    Nothing is computed until the map is sliced, and then only for the images, heads and rows that were asked for:

        m.shape                   # (batch, heads, queries, keys)
        m[:, :, 0]                # one row of every head: what the first token looks at
        m[0, 3]                   # one head of one image
        m[...]                    # all of it

    Rows sum to 1. They are float32 whatever the dtype of the model (float64 for a float64 model), unless the recorder was
    given a `dtype`.

    A map that is copied, pickled or saved with `torch.save` is computed first and keeps neither model nor input; if it cannot
    be read, the copy says why. `torch.load` takes it with weights_only=False alone: `rec.save` makes files to share.

    Attributes:
        name: name of the module in the model; `name#1` is its second call in the same forward.
        shape: (batch, heads, queries, keys).
        dtype: of what slices give.
        device: of what slices give.
        x: the tensor the module was called with.
        call: the captured call: all arguments and the modes they came under.
        called_from: who called the module, if the recorder was told to look (`called_from=True`).
        gradient: dL/dA, if the recorder was told to follow gradients (`gradients=True`).
    """

    def __init__(
        self,
        name: str,
        origin: Origin,
        geometry: Geometry | Places,
        deliver: Delivery,
        called_from: CallSite | None = None,
        gradient: Gradient | None = None,
        compared: Comparison | HookattnError | None = None,
    ) -> None:
        self.name, self._deliver = name, deliver
        self._origin, self._geometry = origin, geometry
        self._called_from, self._gradient, self._compared = called_from, gradient, compared
        self._tokens: tuple[Tokens, Tokens] | None = None  # of queries and of keys, once they are asked for

    def open(self) -> AbstractContextManager[Source]:
        """What the map is computed from, and the modes of its call for as long as the block lasts."""
        return self._origin.open()

    def _spec(self) -> Spec:
        return self._origin.spec

    def __repr__(self) -> str:
        try:
            dtype = str(self.dtype).removeprefix("torch.")
            return f"AttentionMap({self.name!r}, shape={self.shape}, dtype={dtype}, device={self.device})"
        except Exception as error:  # a repr never raises
            return f"AttentionMap({self.name!r}, {type(error).__name__})"

    _repr_html_ = describe_in_html

    @property
    def call(self) -> Call:
        """The captured call."""
        return self._origin.call

    @property
    def called_from(self) -> CallSite:
        """File, line and source of the call, and which module made x.

        Raises:
            RecorderError: the recorder was not told to look who calls.
        """
        if self._called_from is None:
            raise RecorderError(
                "the stack is walked only where asked for: record with AttentionRecorder(model, called_from=True)."
            )
        return self._called_from

    @property
    def gradient(self) -> Gradient:
        """dL/dA, once backward has been called; sliced like the map, see `Gradient`.

        Raises:
            RecorderError: the recorder was not told to follow gradients.
            NoGradientError: when it is sliced and no backward has reached this map.
        """
        if self._gradient is None:
            raise RecorderError(
                "gradients are followed only where asked for: record with AttentionRecorder(model, gradients=True)."
            )
        return self._gradient

    def verify(self, tolerance: float | None = None) -> Difference:
        """Put this map into the module's own forward and see whether the output stays what it was.

        Compared are two runs of the module, made now; with AttentionRecorder(model, verify=True), one made in the forward and
        what the module really put out there. What is returned says which, and prints it.

        Args:
            tolerance: what difference passes, relative to the largest output (or 1 if that is smaller); by default
                1e-10 for float64 outputs, 1e-4 for float32, 2e-2 for float16 and 6e-2 for bfloat16, or three times what
                rounding of the map alone does to the output, where that is more: activations in int8 may jump by a step.

        Returns:
            The largest absolute difference between the two outputs, a float.

        Raises:
            UnfaithfulMapError: the difference is larger than that.
            UnreadableError: the module forms its map in a kernel of its own, and no other can be put in its place.
            RecorderError: the input was let go (`keep="maps"` without `verify=True`).
            StaleMapError: an input or a parameter has changed since the forward.
        """
        if isinstance(self._compared, HookattnError):
            raise type(self._compared)(str(self._compared))  # another each time: one that was raised keeps what was called
        if self._compared is None:
            attention = self.read(...)  # first, since a map that is lost tells why
            return compare_runs(self.call, attention).judged(self.name, tolerance)
        if not isinstance(self._origin, Kept):
            self._compared.check_same(self.name, self.read(...))
        return self._compared.judged(self.name, tolerance)

    @property
    def axes(self) -> tuple[str, str, str, str]:
        """Names of the four axes.

        The first is "batch" where it counts images, or wholes of several that are looked at together (frames of a clip), or,
        where no image was seen, what the module was called with. It is "batch * windows" where it is known how images are cut,
        window w of image b at b * windows + w, and "sequence" where all that is known is that tokens of one entry attend to
        each other. The others are "head", "query" and "key"; the last two "channel" where channels attend to channels.
        """
        return name_axes(self._geometry, self.shape)

    @property
    def tokens(self) -> Tokens:
        """What the keys stand for: prefix tokens and patches of the image.

        Raises:
            TokenError: the keys are no prefix tokens and patches, or it is not known of which part of the image.
        """
        return self._both_tokens()[1]

    @property
    def query_tokens(self) -> Tokens:
        """What the queries stand for; the same as `tokens` where all tokens ask and answer.

        Raises:
            TokenError: see `tokens`.
        """
        return self._both_tokens()[0]

    def image(self, query: Query = "cls", heads: str | int | None = "mean", size: Size | int | None = None) -> Tensor:
        """What a query attends to, as a picture: its row over the patches, laid out on the grid that covers the image.

        Windows, shifted or strided ones too, are put back where they lie on the image: a query attends to patches of its own
        window, and the picture is zero elsewhere. What the query gives to prefix tokens and to padding is left out and not
        made up for, so a picture sums to at most 1.

        Args:
            query: "cls" or another prefix token by name, "mean" for the mean of all patch queries, (row, col) of a patch on the
                grid of the queries, (y, x) for the patch under a point, in fractions of the image (0.0 to 1.0), or the
                number of a token.
            heads: "mean" over heads, one head by its number, or None for all of them.
            size: (height, width) of the whole image in pixels, or one number for both, to draw patches on: a pixel gets what
                the patch under its centre has, and NaN where the model saw nothing, as in a rest that fills no patch; None for
                the grid of the keys. Images that came as patches, each with a grid of its own, are drawn one by one; without
                a size they lie in the upper left corner of a common grid.

        Returns:
            (images, height, width), or (images, heads, height, width) for heads=None.

        Raises:
            TokenError: there is no such query, or it is not known where the keys lie on the image.
        """
        queries, keys = self._both_tokens()
        return self._deliver(draw_rows(self, queries, keys, query, heads, size))

    def rows(self, query: Query = "cls") -> Tensor:
        """What a query attends to, head by head: its row of the map, of every image.

        Args:
            query: as in `image`, but no "mean".

        Returns:
            (images, heads, keys); where an image is cut into windows, the keys of the window that the query is in.

        Raises:
            TokenError: there is no such query, or it stands in several windows.
        """
        return self[index_of_row(self.name, *self._both_tokens(), query)]

    def computed(self) -> AttentionMap:
        """This map computed now, for keep="maps" while the call is at hand; or one that says why it could not be.

        Inside of `deferring` it stays pending if its axes would have to be established.
        """
        try:
            return self.kept(self.read(...))
        except NotEstablishedError:
            return self._from(Deferred(self.call))
        except Exception as reason:  # whatever it is, the user's forward goes on
            return self.lost(reason)

    def watched(self, watch: Watch) -> AttentionMap:
        """This map, to be computed of what was noted while its module ran."""
        return self._from(Watched(self.call, watch))

    def _both_tokens(self) -> tuple[Tokens, Tokens]:
        if self._tokens is None:
            self._tokens = find_tokens(self._geometry, self.shape)
        return self._tokens

    @property
    def why_unreadable(self) -> str:
        """Why its module forms no map that could be read; nothing if it does."""
        return self._origin.why_unreadable

    @property
    def is_pending(self) -> bool:
        """Whether it was to be computed while the model ran, and waits for its axes to be established."""
        return isinstance(self._origin, (Deferred, Watched))

    def compared_with(self, call: Call, output: Any) -> AttentionMap:
        """This map, with what came of putting it into a call that has just ended, for `verify`; or with why it could not be."""
        compared: Comparison | HookattnError
        try:
            call = call.restamped()
            m = self if isinstance(self._origin, Kept) else self._from(Captured(call))
            with saving_unseen():
                compared = compare_with_output(call, m.read(...).detach().to(call.x.device), output)
        except Exception as error:  # whatever it is, the user's forward goes on
            kind = type(error) if isinstance(error, HookattnError) else UnreadableError
            compared = kind(reason_of(error))  # without its traceback, which holds what the module was called with
        return self._from(self._origin, compared)

    def kept(self, attention: Tensor) -> AttentionMap:
        """This map with its values, in place of the call that it was computed from."""
        return self._from(Kept(self.name, self._deliver(attention)))

    def lost(self, reason: Exception) -> AttentionMap:
        """This map without values or call, where it could not be computed: reading it tells the reason."""
        # the text alone: the error holds frames, and these what the module was called with
        always = isinstance(reason, UnreadableError) and not isinstance(reason, StaleMapError)
        return self._from(Lost(self.name, reason_of(reason), always=always))

    def settled(self) -> AttentionMap:
        """The same without the model, once the recorder's block has ended, if it was computed: it keeps nothing else alive."""
        if not isinstance(self._origin, Kept):
            return self
        try:
            places = settle(self._geometry, self.shape)
        except Exception:  # of a layout of the user's: told when somebody asks for tokens, not at the end of the block
            return self
        return AttentionMap(self.name, self._origin, places, self._deliver, *self._rest)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, copied and saved as what it is, whatever it is computed from: the whole map, and where it lies."""
        origin = self._origin if isinstance(self._origin, (Lost, Loaded)) else keep_or_lose(self)
        places: Any = None if isinstance(origin, Lost) else settle(self._geometry, origin.spec.shape)
        return reduce_to(AttentionMap, vars(AttentionMap(self.name, origin, places, self._deliver, *self._rest)))

    def derived(self, origin: Origin) -> AttentionMap:
        """Something else over the same queries and keys, read like this map."""
        return AttentionMap(self.name, origin, self._geometry, self._deliver, self._called_from)

    def _from(self, origin: Origin, compared: Comparison | HookattnError | None = None) -> AttentionMap:
        called_from, gradient, before = self._rest
        return AttentionMap(self.name, origin, self._geometry, self._deliver, called_from, gradient, compared or before)

    @property
    def _rest(self) -> tuple[CallSite | None, Gradient | None, Comparison | HookattnError | None]:
        return self._called_from, self._gradient, self._compared
