from tests.support.runs import Quiet as Quiet
