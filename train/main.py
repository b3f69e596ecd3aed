"""python -m train.main --config configs/NAME.py --workdir DIR [--config.field=value]"""

from absl import app, flags, logging
from ml_collections import config_flags

from train import config, loop, mesh

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where everything of the run goes.")


def parse(argv: list[str]) -> list[str]:
    try:
        return app.parse_flags_with_usage(argv)
    except (KeyError, AttributeError, IndexError):
        config.check_keys(flags.FLAGS["config"].parser.parse, argv)
        raise


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise app.UsageError(f"what is {argv[1:]}? Overrides: --config.field=value")
    logging.set_verbosity(logging.WARNING)
    mesh.start(CONFIG.value.hosts)
    try:
        loop.run(CONFIG.value, WORKDIR.value)
    except loop.Stopped as stopped:
        print(stopped, "Start again with the same command.", flush=True)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse)
