"""Every message, as typed structs. Fields of type `TensorIndex` point into the frames that follow the header.

Requests that compute are run by all ranks, one after the other. Hello, Status, Cancel, Ping, Goodbye and Stop are answered
by rank 0 at once, also while a job runs; so are Adjust, whose budget the ranks take over after the jobs that wait, and StopUnused.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from ..config import BackendSpec, MeshSpec, SamplerSpec
from .extras import AnyExtra, LaterEvaluation
from .state import AxisCost, JobCost, JobState, ModelState, RankCost, RankState, Swap, Unit

TensorIndex: TypeAlias = int
ModelKind: TypeAlias = Literal["any", "mmdit", "unet"]
# Of which steps x and denoised are sent along; "last" is every step of a sampler whose last one nobody knows.
Preview: TypeAlias = Literal["none", "last", "all"]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """A body of the wire; its tag is the class name."""


class Hello(Message, frozen=True):
    """`client` is a name that a person can find, `machine` tells processes of one number apart."""

    client: str
    machine: str = ""


class LoadModel(Message, frozen=True):
    """Hold the model at `path`, which must be of that kind; a no-op where it is resident already with these settings.

    Without a mesh the backend takes an exact one that suits the family: see mesh_choice.

    Args:
        dtype: to compute in. weights: of WEIGHTS, what weights are held in; empty: as the file has them quantised, or in dtype.
        fast_fp8: products with fp8 weights that have no scale are made in fp8 too, where cards do that.
        has_fp8: ranks' devices count as such that make products in fp8, whatever they say.
        graphs: evaluations are CUDA graphs from now on, or not: of a resident model too.
    """

    path: str
    key: str
    dtype: str
    mesh: MeshSpec | None
    kernel: str = "auto"
    kind: ModelKind = "any"
    compile: bool = False
    weights: str = ""
    fast_fp8: bool = False
    has_fp8: bool = False
    graphs: bool = False

    @property
    def held_as(self) -> str:
        """How the name begins that the backend gives the model."""
        return f"{self.key}/{self.held_in}{'-fast' * self.fast_fp8}{'-has' * self.has_fp8}/{self.kernel}/"

    @property
    def held_in(self) -> str:
        """What is computed in, and what weights are held in, where that is another."""
        return f"{self.dtype}+{self.weights}" if self.weights else self.dtype


class LoadVAE(Message, frozen=True):
    """Hold the VAE at `paths`: one file, or TAESD's encoder and decoder."""

    paths: list[str]
    key: str
    dtype: str

    @property
    def held_as(self) -> str:
        """The name under which it is held."""
        return f"{self.key}/{self.dtype}/vae"


class LoadControl(Message, frozen=True):
    """Hold the ControlNet at `path` for the resident `model`, in its mesh and dtype."""

    path: str
    key: str
    model: str
    kernel: str = "auto"

    @property
    def held_as(self) -> str:
        """The name under which it is held."""
        return f"{self.key}/control/{self.model}"


class ControlUse(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A resident ControlNet on a prompt, computed by the ranks.

    Args:
        hint: as the network takes it: pixels in 0..1, or a latent in its scale.
        start, end: sigmas between which it is added; None from the first, or to the last.
        types: of a union's, what its hint is.
    """

    net: str
    hint: TensorIndex
    strength: float = 1.0
    start: float | None = None
    end: float | None = None
    types: tuple[int, ...] = ()


class Prompt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`sizes`: of SDXL's micro-conditioning, where the pooled tensor doesn't hold them embedded. `concat`: see Conditioning."""

    context: TensorIndex
    pooled: TensorIndex
    sizes: list[float] | None = None
    concat: TensorIndex | None = None
    controls: list[ControlUse] = []

    @property
    def tensors(self) -> list[TensorIndex]:
        beside = [] if self.concat is None else [self.concat]
        return [self.context, self.pooled, *beside, *(use.hint for use in self.controls)]


class Patches(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What lies on the model's weights, in files of the runtime folder: see checkpoint_files/patch_file.py.

    The products of the file `low_rank` count `scales`, one each; what the file `whole` has takes the weights' place.
    """

    low_rank: str = ""
    scales: list[float] = []
    whole: str = ""

    @property
    def files(self) -> list[str]:
        return [name for name in (self.low_rank, self.whole) if name]


class Sample(Message, frozen=True):
    """Run the whole loop. Without `uncond` there is no guidance, whatever cfg_scale says.

    With `trace`, a table of what each rank did when follows the latent: see distributed/traffic.py. `extras` act in the
    evaluations of all prompts, of which `cond` is prompt 0 and `uncond` prompt 1; beside them, `uncond_extras` act in those of
    uncond alone, and `weaker` makes the weaker model that `spec.weaker` leads away from.

    Args:
        empty: Perp-Neg's third prompt, and its number for extras that differ by prompt.
    """

    model: str
    spec: SamplerSpec
    latent: TensorIndex
    cond: Prompt
    uncond: Prompt | None = None
    mask: TensorIndex | None = None
    noise: TensorIndex | None = None
    sigmas: TensorIndex | None = None
    batch_index: list[int] | None = None
    preview: Preview = "none"
    trace: bool = False
    patches: Patches = Patches()
    extras: list[AnyExtra] = []
    empty: Prompt | None = None
    empty_number: int = 2
    uncond_extras: list[AnyExtra] = []
    weaker: list[AnyExtra] = []

    @property
    def prompts(self) -> list[Prompt]:
        return [prompt for prompt in (self.cond, self.uncond, self.empty) if prompt is not None]


class Control(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is added to the model's activations in an evaluation, by its places: see models/residuals.py."""

    input: list[TensorIndex | None] = []
    middle: TensorIndex | None = None
    output: list[TensorIndex | None] = []

    @property
    def indices(self) -> list[TensorIndex]:
        return [index for index in (*self.input, self.middle, *self.output) if index is not None]


class Forward(Message, frozen=True):
    """One evaluation of the model, rows as they come: as many for each of `branches`, which are prompts' numbers (0 cond, 1 uncond).

    Of `extras`, those act that do at `sigma`; all do where it is None. `later` is computed by other requests: what of it can't be
    honoured is refused here.
    """

    model: str
    x: TensorIndex
    timesteps: TensorIndex
    context: TensorIndex
    pooled: TensorIndex
    patches: Patches = Patches()
    control: Control = Control()
    controls: list[ControlUse] = []
    extras: list[AnyExtra] = []
    branches: list[int] = msgspec.field(default_factory=lambda: [0])
    sigma: float | None = None
    later: list[LaterEvaluation] = []


class PatchFilePart(Message, frozen=True):
    """Bytes of a patch file, for hosts that don't see the client's runtime folder; the last part makes it whole there."""

    file: str
    part: int
    last: bool
    data: TensorIndex


class Decode(Message, frozen=True):
    """Latent to image; with `raw`, the model's own output before it is clamped to 0..1, channels first."""

    vae: str
    latent: TensorIndex
    raw: bool = False


class Encode(Message, frozen=True):
    vae: str
    image: TensorIndex


class Unload(Message, frozen=True):
    """Free these models; all of them where none is named."""

    models: list[str] = []


class Forget(Message, frozen=True):
    """Free these kept tensors, and what was kept in samplings of these names. Rank 0 asks for it when the connection that sent them is
    closed."""

    keys: list[str]


class Goodbye(Message, frozen=True):
    """The connection is being closed: what it has sent need not be kept."""


class Status(Message, frozen=True):
    pass


class Cancel(Message, frozen=True):
    """Ends the client's own job of that number at its next step, or takes it from the queue."""

    job: int


class Ping(Message, frozen=True):
    """Asks whether the client's own job of that number waits or runs."""

    job: int


class Stop(Message, frozen=True):
    pass


class StopUnused(Message, frozen=True):
    """A Stop where nothing runs or waits and nobody else is connected; else nothing, and the answer is a BackendState.

    `client`, `machine`: the asker's, as in its Hello.
    """

    client: str
    machine: str


class Adjust(Message, frozen=True):
    """Another idle time or memory budget from now on, where given; answered by the BackendState of before.

    Models beyond the new budget leave at once, the least recently used first.
    """

    idle_seconds: float | None = None
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        given = {"idle_seconds": self.idle_seconds, "memory_budget": self.memory_budget}
        BackendSpec(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type] # its checks

    def on(self, idle_seconds: float, memory_budget: int) -> Adjust:
        """With what it leaves open as it is now."""
        return Adjust(
            idle_seconds if self.idle_seconds is None else self.idle_seconds,
            memory_budget if self.memory_budget is None else self.memory_budget,
        )


class Welcome(Message, frozen=True):
    generation: str
    world_size: int
    device: str


class Pong(Message, frozen=True):
    """`ahead`: how many jobs come before it. What isn't known is done, or was lost with a connection."""

    known: bool
    ahead: int = 0


class Progress(Message, frozen=True):
    """Something long is under way: `done` of `total` of `what`; in bytes, those of rank 0's part."""

    what: str
    done: int
    total: int
    unit: Unit = ""

    @property
    def text(self) -> str:
        """As a person reads it."""
        if self.unit == "bytes":
            name, size = ("GiB", 2**30) if self.total >= 2**30 else ("MiB", 2**20)
            return f"{self.what}: {self.done / size:.1f} of {self.total / size:.1f} {name} a rank"
        if self.total > 1:
            return f"{self.what}: {self.done} of {self.total}"
        return f"{self.what}: done" if self.done else self.what


class StepDone(Message, frozen=True):
    """A sampling step was evaluated; tensors, where a preview was asked for: x and denoised."""

    index: int
    total: int


class Loaded(Message, frozen=True):
    """`bytes_read` has one entry per rank, 0 where the model was resident. `notes` are for the user to read."""

    model: str
    family: str
    bytes_read: list[int]
    resident_bytes: list[int]
    seconds: float
    evicted: list[str]
    channels: int
    notes: list[str] = []


class Result(Message, frozen=True):
    """The job is done; its tensors follow. `seconds` are rank 0's, from start to end; `ranks` has what a sampling cost.

    `bad_step`: of a latent that holds NaN or infinity, the first step that made any.
    """

    seconds: float
    steps: int = 0
    ranks: list[RankCost] = []
    swap: Swap = Swap()
    bad_step: int | None = None

    @property
    def costs(self) -> list[AxisCost]:
        """Rank 0's."""
        return self.ranks[0].costs if self.ranks else []

    @property
    def notes(self) -> list[str]:
        """All ranks', each once."""
        return list(dict.fromkeys(note for rank in self.ranks for note in rank.notes))


class Done(Message, frozen=True):
    pass


class Failed(Message, frozen=True):
    """An error by its parts: see errors.py."""

    code: str
    message: str
    remedy: str
    details: str = ""


class BackendState(Message, frozen=True):
    """What a backend is, holds and does.

    `restarts`: how often torchrun has started its ranks anew. `refused`: messages that could not be read. `clients`: who is
    connected, by name. `memory_budget`: bytes on a rank, 0 for none. `quiet`: seconds since its last job. `job` is the one that
    runs, `last` what the last sampling cost. Models stand in the order of their use, the latest last.
    """

    version: str
    generation: str
    name: str
    uptime: float = 0.0
    ranks: list[RankState] = []
    models: list[ModelState] = []
    running: str = ""
    queued: int = 0
    jobs_done: int = 0
    jobs_failed: int = 0
    cached_tensors: int = 0
    cached_bytes: int = 0
    restarts: int = 0
    refused: int = 0
    clients: list[str] = []
    idle_seconds: float = 0.0
    memory_budget: int = 0
    quiet: float = 0.0
    job: JobState | None = None
    last: JobCost | None = None


Request: TypeAlias = (
    Hello
    | LoadModel
    | LoadVAE
    | LoadControl
    | Sample
    | Forward
    | PatchFilePart
    | Decode
    | Encode
    | Unload
    | Forget
    | Status
    | Cancel
    | Ping
    | Goodbye
    | Stop
    | StopUnused
    | Adjust
)
Reply: TypeAlias = Welcome | Pong | Progress | StepDone | Loaded | Result | Done | Failed | BackendState
FINAL_REPLIES = (Welcome, Pong, Loaded, Result, Done, Failed, BackendState)
