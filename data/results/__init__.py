"""Measuring, which is no part of a method.

evaluate.py, complexity.py, figures.py and trace.py are the commands eval, profile, figures and trace of all;
ablations.py trains a paper's ablations with several seeds, and pages.py writes what they say into the pages.
None of them knows a paper: what is measured of one alone stands beside its page, SCRIPT.md, in SCRIPT.py
(rosetta.py measures nothing; it lays the scripts' lines side by side):

    eval_flags(p, script)      evaluate(script, args)
    profile_flags(p, script)   build(script, base, cfg1, cfg2, lora) -> model    profile(script, args, build)
    figure_flags(p, script)    figures(script, args)    AGAINST: the choice to which they compare, or None
    FROZEN             by stage, what the paper keeps as it is: beside the ledger

    TITLE, COST        in the README's table; the paper's parameters and MACs at 1024 x 1024, by profile
    CHOICES, COLUMNS   of the ablations' table: its rows and columns
    CLAIMS, CONDITION  what the paper says; where that is measured, unless a claim tells
    EXERCISE           the choice that the page's second exercise tries, and {condition: metrics} expected
    restored_and_qf(script, model, lq)   of models that know a JPEG's quality, for quality.py
    EVAL               flags of eval: for the default run and the weights that ship; for the other choices;
                       at paper size, unless they are the first
    ALSO               more flags of eval, for the weights that ship alone: {name of the block: flags}
    PRINTED            commands whose words stand on the page: {name of the block: command}
    MORE               that a default run measures: {title: {label: condition}}
    more_figures(metrics, run)   the same, of metrics.json, and of the run's folder where it was trained here
    lead_table(rows)             what the default run and the weights that ship come to, in a few columns
    default_table(rows)          the same, all columns
    headline(rows)               in the README's table: what, before, made, made by the weights that ship, gap

`script` is always the paper's script as a module, which is imported nowhere a second time."""
