class Drift:
    def observe(s, *a):
        pass

    def feedback(s, r):
        pass

    def state(s):
        return {}
