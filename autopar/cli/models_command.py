"""`autopar models`: the presets."""

from autopar.cli.console import output, print_json
from autopar.cli.options import Debug, Json
from autopar.cli.units import count
from autopar.models.catalog import presets


def models(json: Json = False, debug: Debug = False) -> None:
    """List the models that can be named without a file."""
    if json:
        rows = [
            {"name": p.name, "family": p.family, "parameters": p.parameters, "default_seq": p.default_seq, "description": p.description, "source": p.source}
            for p in presets()
        ]
        print_json({"models": rows})
        return
    from rich.table import Table

    table = Table("MODEL", "FAMILY", "PARAMETERS", "DESCRIPTION", box=None, pad_edge=False)
    table.columns[2].justify = "right"
    for p in presets():
        table.add_row(p.name, p.family, count(p.parameters), p.description)
    page = output()
    page.print(table)
    page.print("next: autopar plan gpt2 --cluster h100-sxm:1", style="dim")
