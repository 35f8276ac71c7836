"""From scores, hits and statistics to pages and tables that people look at.

In: what the other rooms wrote. Out: HTML pages and console tables. Read first: `evaluation_page.py`.
"""
