"""Short measured runs of one recipe over lengths and features, each the product's own training job in a process of its
own. Read in this order: `ladder`, `cases`, `trial`, `search`, `sweep`, `report`.
"""
