"""What is trained and evaluated for each page of results."""

from collections.abc import Iterator
from pathlib import Path

from profiling.quality.steps import Command, Step

SEEDS = (0, 1, 2)
EDGES = ("--edges", "guided", "none")  # pictures show the first
# Both stages as in `make demo`.
DEMO_IMAGE = ("--num-videos", "120", "--steps", "2000")
DEMO_VIDEO = ("--steps", "1000")
SCENES_SIZE, SCENES_TRAINED = (256, 384), (128, 192)
CLIP_METHODS = (  # method, variant, options
    ("slot-contrast", "", ()),
    ("slot-contrast", "alone", ("--contrast-weight", "0")),
    ("videosaur", "", ()),
)
VARIANTS = {"": "", "alone": ", α = 0"}
SCENES_PROTOCOLS = ("--protocol", "interpreter", "interpreter-spatio-temporal")
CLIPS_PROTOCOL = ("--protocol", "slot-contrast")
CLIPS_BASELINES = ("--baselines", "one-segment", "grid", "k-means", "k-means-positions", "--clusters", "9", "11")
SCENES_BASELINES = ("--baselines", "one-segment", "grid", "k-means", "k-means-positions", "--clusters", "8", "11")

DAVIS_SIZE, DAVIS_LARGE = (336, 504), (504, 756)
DAVIS_PROTOCOLS = {
    "2016": ("--protocol", "davis-2016", "interpreter", "smtc"),
    "2017": ("--protocol", "davis-2017-unsupervised", "interpreter"),
}
DAVIS_BASELINES = ("--baselines", "one-segment", "grid", "k-means", "spectral", "--clusters", "6", "8")
KMEANS_ALONE = ("--baselines", "k-means", "--clusters", "6", "8")
NO_BASELINES = ("--baselines",)
# DINOSAUR's demo for a ViT, whose features have positions already, with as many slots as for real pictures.
DINOSAUR_ON_DAVIS = ("--no-input-positions", "--num-slots", "7", "--frame-size", "168", "252")
ALL_PICTURES = ("--pictures", "4")  # of the best and of the worst: all eight sequences
FEW = 3  # videos that segmenting is timed on, where not all of them are drawn

Size = tuple[int, int]


def scenes(out: Path) -> Iterator[Step]:
    """Generated scenes: Interpreter with both ways of association, DINOSAUR, methods that follow clips, and k-means."""
    data = ("--root", str(out / "data"))

    def train(method: str, seed: int, *stages: tuple[str, tuple[str, ...]], variant: str = "") -> Step:
        folder = out / f"{method}{variant and '-'}{variant}-{seed}"
        common = ("--run", str(folder), "--seed", str(seed))
        commands = (
            Command(title, ("interpreter.train", "--method", method, "--stage", title, *common, *options))
            for title, options in stages
        )
        return Step("train", TITLES[method] + VARIANTS[variant], seed, folder, tuple(commands))

    def evaluate(title: str, name: str, run: Step, *options: str) -> Step:
        folder = out / f"scores-{name}-{run.seed}"
        size = ("--frame-size", *map(str, SCENES_SIZE))
        arguments = (
            *("interpreter.evaluate", "--run", str(run.folder), *data, "--seeds", str(run.seed), *size),
            *(*SCENES_PROTOCOLS, *EDGES, *options, "--out", str(folder)),
        )
        command = Command("evaluation", arguments)
        return Step("evaluate", title, run.seed, folder, (command,), (run,), "scenes", SCENES_SIZE)

    def evaluate_clips(run: Step, *options: str) -> Step:
        """By the protocol of Slot Contrast, at the frame size of the training."""
        folder = out / f"scores-clips-{run.folder.name}"
        arguments = (
            *("interpreter.evaluate", "--run", str(run.folder), *data, "--seeds", str(run.seed), "--frame-size"),
            *(*map(str, SCENES_TRAINED), *CLIPS_PROTOCOL, *options, "--out", str(folder)),
        )
        command = Command("evaluation", arguments)
        return Step("evaluate", run.method, run.seed, folder, (command,), (run,), "scenes-clips", SCENES_TRAINED)

    cache = (*data, "--cache", str(out / "cache"))
    by_features, learned = ("--association", "features"), ("--association", "learned")
    for seed in SEEDS:
        run = train("interpreter", seed, ("image", (*cache, *DEMO_IMAGE)), ("video", DEMO_VIDEO))
        dinosaur = train("dinosaur", seed, ("model", (*cache, *DEMO_IMAGE[:2])))
        yield run
        yield evaluate("Interpreter, association by features", "features", run, *by_features, *SCENES_BASELINES)
        yield evaluate("Interpreter, learned association", "learned", run, *learned, *NO_BASELINES)
        yield dinosaur
        yield evaluate("DINOSAUR", "dinosaur", dinosaur, *NO_BASELINES)
        yield evaluate_clips(run, *by_features, *CLIPS_BASELINES)
        yield evaluate_clips(dinosaur, *NO_BASELINES)
        clips = (*cache, *DEMO_IMAGE[:2])
        for method, variant, options in CLIP_METHODS:
            step = train(method, seed, ("model", (*clips, *options)), variant=variant)
            yield step
            yield evaluate_clips(step, *NO_BASELINES)
        if seed == SEEDS[0]:
            for name, step, options in (("interpreter", run, by_features), ("dinosaur", dinosaur, ())):
                yield strips(step, out / f"strips-{name}", SCENES_SIZE, *data, "--first", str(FEW), *options)


def davis(out: Path, root: Path, backbone: str) -> Iterator[Step]:
    """DAVIS-2016 and two sequences of DAVIS-2017: Interpreter, clustering without training, DINOSAUR and baselines."""
    data = ("--data", "davis", "--root", str(root))
    vit = ("--backbone", backbone, "--feature-layer", "8", "--no-feature-norm")

    def train(method: str, seed: int, stage: str, *options: str) -> Step:
        folder = out / f"{method}-{seed}"
        where = ("--run", str(folder), "--cache", str(out / "cache"), "--seed", str(seed))
        arguments = ("interpreter.train", "--method", method, "--stage", stage, *options, *data, *vit, *where)
        return Step("train", TITLES[method], seed, folder, (Command(stage, arguments),))

    def evaluate(
        method: str, run: Step | None, year: str, size: Size, *options: str, seeds: tuple[int, ...] = SEEDS
    ) -> Step:
        folder = out / f"scores-{year}-{size[0]}-{method}-{seeds[0]}"
        subject = ("--method", method, *vit) if run is None else ("--run", str(run.folder))
        arguments = (
            *("interpreter.evaluate", *subject, *data, "--year", year, "--seeds", *map(str, seeds)),
            *("--frame-size", *map(str, size), *DAVIS_PROTOCOLS[year], *EDGES, *ALL_PICTURES, *options),
            *("--out", str(folder)),
        )
        needs = () if run is None else (run,)
        command = Command("evaluation", arguments)
        return Step("evaluate", TITLES[method], seeds[0], folder, (command,), needs, f"davis-{year}", size)

    by_features = ("--association", "features")
    for seed in SEEDS:
        run = train("interpreter", seed, "image", "--preset", "davis")
        yield run
        first = seed == SEEDS[0]
        baselines = DAVIS_BASELINES if first else KMEANS_ALONE
        yield evaluate("interpreter", run, "2016", DAVIS_SIZE, *by_features, *baselines, seeds=(seed,))
        if not first:
            continue
        yield strips(run, out / "strips-2016", DAVIS_SIZE, *data, "--first", str(FEW), *by_features)
        # The rest is of one training.
        for size in (DAVIS_SIZE, DAVIS_LARGE):
            yield evaluate("interpreter", run, "2017", size, *by_features, *KMEANS_ALONE)
        yield evaluate("interpreter", run, "2016", DAVIS_LARGE, *by_features, *KMEANS_ALONE, seeds=(seed,))
        dinosaur = train("dinosaur", seed, "model", *DINOSAUR_ON_DAVIS)
        yield dinosaur
        for year in DAVIS_PROTOCOLS:
            yield evaluate("dinosaur", dinosaur, year, DAVIS_SIZE, *NO_BASELINES)
        for year in DAVIS_PROTOCOLS:
            yield evaluate("cluster", None, year, DAVIS_SIZE, *NO_BASELINES)


def strips(run: Step, folder: Path, size: Size, *options: str) -> Step:
    """Times of segmenting, with pictures."""
    where = ("--run", str(run.folder), *options, "--frame-size", *map(str, size), "--out", str(folder))
    command = Command("pictures", ("profiling.quality.strips", *where))
    return Step("strips", run.method, SEEDS[0], folder, (command,), (run,), size=size)


TITLES = {
    "interpreter": "Interpreter",
    "dinosaur": "DINOSAUR",
    "slot-contrast": "Slot Contrast",
    "videosaur": "VideoSAUR",
    "solv": "SOLV",
    "smtc": "SMTC",
    "cluster": "clusters of tokens",
}
"""Methods as the tables name them."""
