from tests.support.runs import Finished as Finished
