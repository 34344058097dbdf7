"""A script's trace: what each symbol of its docstring's table is for a picture of yours, as it comes to be.

    python SCRIPT.py trace photo.jpg

Local variables are watched in one inference; then, for symbols still missing, in a step of each stage."""

import re
import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from io import StringIO
from linecache import getline
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from common import pad_to, to_image, to_tensor
from data.files import UserError
from data.pictures import read_image
from data.results.tables import centre, text_table
from data.runs import CommandLine, name_of


class Trace:
    def __init__(self, script):
        self.file, self.missing, self.sizes, self.lines = script.__file__, {}, {}, {}
        for row in re.findall(r"^\| (.+) \|$", script.__doc__, re.M)[2:]:
            symbols, names, shape, about = map(str.strip, row.split("|"))
            shape = self.missing[shape[3:]][1] if shape.startswith("as ") else shape.replace("integer", "()")
            place = re.search(r"`(\w+)`|$", about)[1] or ""  # the only function or class where it counts
            self.missing |= {k: (s, shape, place) for s, k in zip(symbols.split(", "), names.split(", "))}

    def show(self, call, **sizes: int) -> None:
        """Prints the missing symbols that come to be in call(), which ends with the last."""
        self.rows, self.sizes = [], self.sizes | sizes
        with suppress(SystemExit), ExitStack() as after:
            after.callback(sys.settrace, sys.gettrace())
            sys.settrace(self.event)
            call()
        print(text_table(["paper", "code", "min", "mean", "max", "shape", "first in"], self.rows))

    def event(self, frame, event: str, _):
        """Python calls this before each line of a function; what is new there, the line before has made."""
        if frame.f_code.co_filename != self.file:
            return None
        own, here, n = frame.f_locals, frame.f_code.co_qualname.split("."), frame.f_lineno
        if event == "call":  # arguments: the function's first line below decorators
            self.lines[id(frame)] = next(i for i in range(n, n + 9) if "@" not in getline(self.file, i))
        line, self.lines[id(frame)] = self.lines[id(frame)], n
        for name, (_, shape, place) in [*self.missing.items()]:
            terms = [re.sub(r"(?<=\w) (?=\w)", "*", term.strip()) for term in re.findall("[^(),]+", shape)]
            with suppress(Exception):  # it is not here, or no tensor, or has sizes that are not known yet
                value = torch.as_tensor(eval(name, {k: own[k] if k in own else getattr(own["self"], k)
                                                    for k in re.findall(r"\w+", name)}))  # t[r] has two
                sizes = {term: n for term, n in zip(terms, value.shape) if term.isidentifier()} | self.sizes
                if place in ("", *here) and [eval(term, {}, sizes) for term in terms] == [*value.shape]:
                    self.sizes = sizes | ({} if terms else {name: value.item()})  # a size, too, as a rate's s
                    ends = (f"{f(value.float()):.4g}" for f in (torch.min, torch.mean, torch.max))
                    told = [self.missing.pop(name)[0], name, *ends, f"{(*value.shape,) or 'integer'}"]
                    self.rows.append([*told, f"{Path(self.file).name}:{line}"])
        return self.event if self.missing else sys.exit()  # even from within a training


def train(script, base, image) -> None:
    steps = [f"--s{stage}-{flag}" for stage in (1, 2) for flag in ("steps=1", "batch=2", "crop=64")]
    with TemporaryDirectory() as tmp, redirect_stdout(StringIO()) as out, redirect_stderr(out):
        centre(image, 128).save(f"{tmp}/picture.png")
        Path(tmp, "captions.jsonl").write_text('{"file": "picture.png", "caption": "a photograph"}')
        script.main(["train", *steps, "--data", tmp, "--val", tmp, "--out", f"{tmp}/.run", f"--base={base}"])


def main(script, argv: list[str]) -> None:
    p = CommandLine(f"{name_of(script)}.py trace", description="the docstring's symbols, for a picture")
    p.add_argument("input", help="a picture, whose middle is taken: 512 x 512 pixels, or --tile")
    p.model_flags(name_of(script))
    if codec := hasattr(script, "compress"):
        p.add_argument("--bpp", type=script.parse_bpp, default="0.0313", help="default: 0.0313")
    args = p.parse_args(argv)
    image = centre(read_image(args.input)[0], max(1, args.tile or 512))
    model = script.load(args.weights, args.base)
    image = to_image(pad_to(to_tensor(image)[None], model.cell)[0])
    trace = Trace(script)
    trace.show(lambda: script.decompress(model, script.compress(model, image, args.bpp)) if codec else
               script.restore(model, image))
    print("\nsizes:", ", ".join(f"{k} = {n}" for k, n in sorted(trace.sizes.items()) if k.isidentifier()))
    if trace.missing:
        print("\nnot in inference, but in a step of training on two crops of 64 x 64 pixels:\n")
        trace.show(lambda: train(script, model.base, image), B=2, H=64, W=64)
    if trace.missing:
        raise UserError(f"{', '.join(trace.missing)}: never as the docstring of {name_of(script)}.py says")
