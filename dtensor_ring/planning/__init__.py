"""Who holds which token, what may attend to what, and which rank fetches and computes what, when: integers only.

Nothing here knows tensors, processes or devices, so a plan can be made, drawn and tested anywhere.
"""
