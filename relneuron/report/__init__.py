"""What every page is made of: numbers, tables, the figure kit and the templates.

May import `artifact`. A page itself stands where its study is made (`analyses`, `methods`);
`cli.pages` chooses it. Begin with `tables.Table` and `kit.figure`.
"""
