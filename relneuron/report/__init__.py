"""What every page is made of: the engine and its template, numbers, tables, the figure kit.

May import `artifact`. A page itself stands where its study is made (`analyses`, `methods`), each
with a constant `PAGE`. Begin with `page.PageKind` and `page.Page`.
"""
