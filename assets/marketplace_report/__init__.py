"""The asset `marketplace_report`: one HTML page that people explore, and some of its charts in the Dagster UI.

The flow, in order:

1. `asset`    asks for the material, makes the page and the pictures;
2. `read`     has the summary, or one customer's own tables, the customers that failed most, and the journals;
3. `numbers`  adds up by day, period, marketplace and action, compares, and says what stands out;
4. `charts`   are the charts, as Vega-Lite, for the page and for pictures;
5. `page`     puts it all into one file that needs no network, with the charts' library; its script, `page.js`, shows
              what is chosen.
"""
