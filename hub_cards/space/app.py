"""The page of `peft-icm app`, as a Space."""

from peft_icm import ICMGenerator
from peft_icm.app.page import serve
from peft_icm.app.serving import Service

serve(Service(ICMGenerator.from_pretrained({{ name }}, revision={{ revision }}, subfolder={{ subfolder }})))
