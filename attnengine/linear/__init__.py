"""Linear attention: attention with a recurrent state in the place of a matrix of scores."""

from . import reference as reference  # makes ae.reference serve a LinearAttentionSpec
