"""Tables, read back from what is printed."""





def table_cells(printed):
    """Each row's values by its name."""
    rows = [line.split("│")[1:-1] for line in printed.splitlines() if line.startswith("│")]
    return {name.strip(): [cell.strip() for cell in found] for name, *found in rows}
