"""The four methods side by side, in their own lines of code: writes rosetta.md beside this file.

    python -m data.results.rosetta

A cell is named "function: how a line begins & another; function: ..."; of each there must be one."""

import ast
import functools
from pathlib import Path

from data.files import ROOT, UserError, atomic
from data.results.seeds import markdown
from data.runs import CommandLine, run_cli

SCRIPTS = ("codiff", "oscar", "sodiff", "moe_diffir")
TRAINING = {
    "sample": ("stage2: for step", "stage2: for step & r = & z_0 =", "stage2: for step", "stage2: for step"),
    "condition": ("CODiff.condition: tokens = & return self.proj(", "OSCAR.denoise: prompt =",
                  "SODiff.condition: e_img =", "MoEDiffIR.sample: dp = & c ="),
    "t": ("CODiff.__init__: self.base, self.T_L", "OSCAR.denoise: t =",
          "stage2: g =; SODiff.condition: qf_hat, logits = & return e_img, qf_hat",
          "MoEDiffIR.sample: if t :="),
    "one step": ("stage2: x_hat, z_hat =; CODiff.denoise: eps = & return",
                 "stage2: z_tilde, l_vq, z_hat, x_hat =; OSCAR.denoise: out = & return",
                 "stage2: x_hat, z_hat, e_img; SODiff.denoise: eps = & return",
                 "MoEDiffIR.sample: return self.sd.x0(; stage2: z_0 = & x_hat ="),
    "losses": ("stage2: terms = & weighted = & loss =", "stage2: l_sim = & terms = & weighted = & loss =",
               'stage2: terms = & terms["qf"] = & weighted = & loss =', "stage2: terms = & loss ="),
    "critic": ("stage2: with frozen( & z_H = & fake, true = & l_D =",
               "stage2: with frozen( & fake, true = & l_D =",
               "stage2: with frozen( & fake = & z_H = & fake, true = & l_D =", ""),
    "what trains": ("CODiff.__init__: self.cave = & self.proj =; CODiff.add_lora: add_lora(self.sd.u"
                    " & add_lora(self.sd.v; stage2: opt_G = & opt_D =",
                    "OSCAR.__init__: self.hyper_encoders = & self.prompt =; OSCAR.add_lora: add_lora("
                    "; stage2: opt_G = & opt_D = & logged[f",
                    "SODiff.__init__: self.E_down = & self.T_align = & self.predictor = T"
                    "; SODiff.add_lora: common.add; stage2: opt_G = & opt_D =",
                    "stage2: model = & compensator = & adam =")}
INFERENCE = {
    "picture in": ("restore: x_lq = & x = & z_L =", "compress: x = & z_0 = & idx =", "restore: x = & z_L =",
                   "restore: x_lq = & x = & encode = & z_lq ="),
    "condition": ("CODiff.denoise: c_L =", "OSCAR.denoise: prompt =", "restore: e_img, qf_hat, tau =",
                  "MoEDiffIR.sample: dp = & c ="),
    "t": ("CODiff.__init__: self.base, self.T_L", "load: G =; OSCAR.denoise: t =",
          "expected_timestep: i = & return", "MoEDiffIR.sample: if t :="),
    "one step": ("restore: z_hat =; CODiff.denoise: eps = & return",
                 "decompress: z_tilde = & z_hat =; OSCAR.denoise: out = & return",
                 "restore: z_hat =; SODiff.denoise: eps = & return",
                 "restore: z_0 =; MoEDiffIR.sample: return self.sd.x0("),
    "picture out": ("restore: x_hat = tiles( & x_hat = x_hat[ & return", "decompress: x_hat = & return",
                    "restore: x_hat = tiles( & x_hat = x_hat[ & return", "restore: x_hat = & return")}


@functools.cache
def parsed(script: str) -> tuple[ast.Module, list[str]]:
    text = (ROOT / f"{script}.py").read_text()
    return ast.parse(text), text.splitlines()


def quoted(script: str, function: str, start: str) -> str:
    """The one statement of a function that begins like this, whole (of a block the head), and where it is."""
    scope, lines = parsed(script)
    for name in function.split("."):
        scope = next((node for node in scope.body if getattr(node, "name", "") == name), ast.Module([]))
    found = [node for node in ast.walk(scope) if isinstance(node, ast.stmt) and node is not scope
             and lines[node.lineno - 1].strip().startswith(start)]
    if len(found) != 1:
        raise UserError(f"{script}.py, {function}: {len(found)} lines begin with {start!r}, not one")
    last = found[0].body[0].lineno - 1 if hasattr(found[0], "body") else found[0].end_lineno
    code = "<br>".join(f"`{line.strip()}`" for line in lines[found[0].lineno - 1:last])
    return f"{code} {script}.py:{found[0].lineno}".replace("|", "\\|")


def cell(script: str, anchors: str) -> str:
    parts = [part.split(": ") for part in anchors.split("; ") if part]
    return "<br>".join(quoted(script, name, s) for name, starts in parts for s in starts.split(" & ")) or "-"


def page() -> str:
    text = ["# The four methods side by side",
            "Each cell is the code itself, put here by `python -m data.results.rosetta`; a test compares. Of "
            "MoE-DiffIR stage 2 trains a decoder alone: condition, t and step are stage 1's, frozen."]
    for title, rows in (("Stage 2: a training step", TRAINING), ("Inference, in one step", INFERENCE)):
        table = [[name, *map(cell, SCRIPTS, anchors)] for name, anchors in rows.items()]
        text += [f"## {title}", markdown(["", *(f"[{s}.py](../../{s}.py)" for s in SCRIPTS)], table)]
    return "\n\n".join(text) + "\n"


def main(argv: list[str] | None = None) -> None:
    CommandLine("rosetta", description="rosetta.md, from the scripts").parse_args(argv)
    atomic(Path(__file__).with_suffix(".md"), lambda tmp: tmp.write_text(page()))


if __name__ == "__main__":
    run_cli(main)
