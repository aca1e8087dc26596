"""Pictures of maps.

From top to bottom, an import may only point down:

    page         one HTML file to explore maps on; the same in a notebook
    page_data    what the page holds: rows in bytes, where their tokens lie, figures of heads
    plot         pictures of one map, of its heads, of layers, of a whole forward, and of two beside each other
    sheet        many panels on one sheet, with what is written around them
    charts       entropy and distance of heads, by layer and against each other; any figure of heads as a heat map
    frames       attention over an image, and over one image after another
    draw         one panel on axes, over the image
    scales       from what to what colours run
    panels       the row of a query in one head, on the grid of the image
    layout       where things stand on a sheet
"""
