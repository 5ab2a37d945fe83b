"""Lists, explains, checks, compares and imports packs.

python -m experiments.packs                                       # all packs there are
python -m experiments.packs --explain=cocaine --dose=0.5          # its values in numbers, and where it acts
python -m experiments.packs --validate mine.json yours.json
python -m experiments.packs --diff=caffeine,cocaine
python -m experiments.packs --import_file=config.json --output=packs
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from models import checkpoint
from nmjax import flags as nm_flags
from nmjax import pack_tools, packs, paths
from nmjax.report import results

NAME = "packs"
COMMANDS = ("list", "explain", "validate", "diff", "import_file")
BELONGS = {"dose": "explain", "model": "explain", "output": "import_file", "overwrite": "import_file"}


def define_flags() -> None:
    flags.DEFINE_bool("list", False, "A table of all packs; what is done by default.")
    flags.DEFINE_string("explain", None, "A pack, by name or file: its values at a dose, its layers and heads.")
    flags.DEFINE_float("dose", 1.0, "Dose to explain, 0 or more; packs are meant for 0 to 1.")
    flags.DEFINE_string("model", "checkpoints/tiny", "Checkpoint to explain for: a folder, or a hub id.")
    flags.DEFINE_list("validate", None, "Packs to check, names or files; status 1 if one can't be honoured.")
    flags.DEFINE_list("diff", None, "Two packs, names or files: which effects differ.")
    flags.DEFINE_string("import_file", None, 'A file {"packs": {name: pack, ...}} to make pack files of.')
    flags.DEFINE_string("output", None, "Folder of the imported packs.")
    flags.DEFINE_bool("overwrite", False, "Imports over files that are there already.")


def explain(pack: str, dose: float, model: str) -> None:
    """Prints what a pack is at a dose in a model. Raises ValueError."""
    packs.load_pack(pack).at(dose)  # what is wrong with them, before the model takes its time to load
    print(pack_tools.explain(pack, dose, checkpoint.load(checkpoint.find(model)), model))


def validate(names: Sequence[str]) -> int:
    """Prints a line for each pack; returns how many can't be honoured."""
    bad = 0
    for name in names:
        try:
            pack = packs.load_pack(name)
            print(f"OK {name}: {len(pack.effects)} effects")
        except ValueError as error:
            bad += 1
            print(f"BAD {name}: {one_line(error)}")
    return bad


def import_packs(source: str, output: str, overwrite: bool = False) -> tuple[list[pathlib.Path], list[str]]:
    """Writes a file for every pack of a collection; returns the files, and a line for each pack that has none.

    Raises PackError, and writes nothing, if the source is no collection or a file is there already.
    """
    specs, dropped, errors = pack_tools.imported(packs.read_spec(pathlib.Path(source)), source)
    files = {pathlib.Path(output) / f"{name}.json": spec for name, spec in specs.items()}
    there = [str(file) for file in files if file.exists()]
    if there and not overwrite:
        raise packs.PackError(f"{there[0]} exists (of {len(there)} such); --overwrite replaces it")
    for line in dropped:
        print(one_line(line))
    written = [results.write_atomic(file, pack_tools.render(spec)) for file, spec in files.items()]
    for file, spec in files.items():
        print(f"written {file}: {len(spec['effects'])} effects")
    return written, errors


def one_line(text: object) -> str:
    return " ".join(str(text).split())


def run(given: flags.FlagValues) -> None:
    """Does what the flags say. Raises ValueError for flags that don't go together, or bad input."""
    chosen = [name for name in COMMANDS if given[name].value is not None and given[name].value is not False]
    if len(chosen) > 1:
        raise ValueError(f"--{chosen[0]} and --{chosen[1]}: wanted one of {', '.join(f'--{c}' for c in COMMANDS)}")
    command = chosen[0] if chosen else "list"
    for name, owner in BELONGS.items():
        if given[name].present and command != owner:
            raise ValueError(f"--{name} goes with --{owner} only")
    if command == "list":
        print(pack_tools.listing())
    elif command == "explain":
        explain(given.explain, given.dose, given.model)
    elif command == "validate":
        if not given.validate:
            raise ValueError("--validate is empty, wanted names or files of packs")
        if bad := validate(given.validate):
            raise ValueError(f"{bad} of {len(given.validate)} can't be honoured")
    elif command == "diff":
        if len(given.diff) != 2:
            raise ValueError(f"--diff={','.join(given.diff)}, wanted two packs, A,B")
        print(pack_tools.diff(*given.diff))
    else:
        if not given.output:
            raise ValueError("--import_file needs --output, the folder to write")
        _, errors = import_packs(given.import_file, given.output, given.overwrite)
        if errors:
            more = f"; and {len(errors) - 1} more" if len(errors) > 1 else ""
            for error in errors[1:]:
                print(f"NOT IMPORTED {one_line(error)}")
            raise ValueError(f"NOT IMPORTED {errors[0]}{more}")


def main(_: Sequence[str]) -> None:
    paths.enable_compilation_cache()
    try:
        run(flags.FLAGS)
    except (ValueError, OSError) as error:
        sys.exit(f"{NAME}: {one_line(error)}")


if __name__ == "__main__":
    define_flags()
    nm_flags.run(main)
