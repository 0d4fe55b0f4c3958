def measure(): return []
def table(x): return ""
