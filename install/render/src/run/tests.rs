use serde_json::json;

use super::*;

fn render(text: &str, data: &Value) -> Result<String, String> {
    let mut templates = Templates::default();
    templates
        .add("t", text)
        .map_err(|error| error.to_string())?;
    run(&templates, "t", data).map_err(|error| error.to_string())
}

/// What Go's text/template, with Sprig, makes of the same.
#[test]
fn what_it_says() {
    let data = json!({
        "a": {"b": "x", "n": 3.0, "none": null, "yes": true, "list": ["p", "q"], "map": {"z": 1, "k": "v"}},
        "Files": {"f": "text"},
    });
    for (template, want) in [
        ("a {{ .a.b }} b", "a x b"),
        ("a  {{- /* no */ -}}  b", "ab"),
        (
            "{{ $x := .a.b }}{{ $x }}{{ if true }}{{ $x = \"y\" }}{{ end }}{{ $x }}",
            "xy",
        ),
        (
            "{{ if .a.none }}1{{ else if eq .a.b \"x\" }}2{{ else }}3{{ end }}",
            "2",
        ),
        ("{{ if and .a.yes (not .a.none) }}1{{ end }}", "1"),
        ("{{ or .a.none .a.b }}{{ and .a.yes .a.b }}", "xx"),
        (
            "{{ range $i, $v := .a.list }}{{ $i }}{{ $v }}{{ end }}",
            "0p1q",
        ),
        (
            "{{ range $k, $v := .a.map }}{{ $k }}={{ $v }};{{ end }}",
            "k=v;z=1;",
        ),
        ("{{ range .a.none }}x{{ else }}none{{ end }}", "none"),
        ("{{ with .a.map }}{{ .k }}{{ $.a.b }}{{ end }}", "vx"),
        (
            "{{ with $m := .a.map }}{{ $m.k }}{{ else }}no{{ end }}",
            "v",
        ),
        (
            "{{ define \"d\" }}<{{ . }}>{{ end }}{{ template \"d\" .a.b }}{{ include \"d\" 1 | quote }}",
            "<x>\"<1>\"",
        ),
        (
            "{{ .a.b | default \"d\" }}{{ .a.none | default \"d\" }}",
            "xd",
        ),
        ("{{ (dict \"k\" .a.b).k }}", "x"),
        ("{{ printf \"%s-%d%% %q\" .a.b 2 \"s\" }}", "x-2% \"s\""),
        ("{{ toYaml .a.map | nindent 2 }}", "\n  k: v\n  z: 1"),
        (
            "{{ toJson .a.list }}{{ join \",\" .a.list }}",
            "[\"p\",\"q\"]p,q",
        ),
        (
            "{{ gt (int .a.n) 2 }}{{ lt 1 2 }}{{ ne \"a\" \"b\" }}",
            "truetruetrue",
        ),
        (
            "{{ ternary \"y\" \"n\" .a.yes }}{{ \"ab\" | replace \"b\" \"c\" | trunc 1 }}",
            "ya",
        ),
        ("{{ `raw }}` }}{{ \"\\n}}\" }}", "raw }}\n}}"),
        (
            "{{ mergeOverwrite (dict \"a\" 1 \"b\" 1) (dict \"b\" 2) | toJson }}",
            "{\"a\":1,\"b\":2}",
        ),
        ("{{ .Files.Get \"f\" }}{{ hasKey .a \"b\" }}", "texttrue"),
    ] {
        assert_eq!(render(template, &data).as_deref(), Ok(want), "{template}");
    }
}

#[test]
fn what_it_refuses_says_where() {
    let data = json!({"a": "x", "Files": {}});
    for (template, want) in [
        ("\n{{ .b }}", "t:2: is printed, and has no value"),
        ("{{ .a.b.c }}", "t:1: \"x\" at .a has no field b"),
        (
            "{{ nosuch 1 }}",
            "t:1: nosuch is not a function that is supported",
        ),
        ("{{ trunc \"a\" 1 }}", "t:1: trunc does not take [\"a\",1]"),
        ("{{ required \"say a\" .b }}", "t:1: say a"),
        ("{{ fail \"no\" }}", "t:1: no"),
        ("{{ eq 1 \"1\" }}", "t:1: eq does not take [1,\"1\"]"),
        ("{{ $x }}", "t:1: there is no $x"),
        ("{{ include \"d\" . }}", "t:1: no template \"d\" is defined"),
        ("{{ .Files.Get \"f\" }}", "t:1: the chart has no file \"f\""),
        (
            "{{ define \"d\" }}{{ include \"d\" . }}{{ end }}{{ include \"d\" . }}",
            "t:1: template \"d\" calls itself without end",
        ),
        ("{{ if true }}", "t:1: `end` is missing"),
        ("{{ end }}", "t:1: `end` closes nothing"),
        ("{{ else }}", "t:1: `else` closes nothing"),
        ("{{ if }}{{ end }}", "t:1: an expression is missing"),
        ("{{ (1 }}", "t:1: `)` is missing"),
        ("{{ 1) }}", "t:1: `)` closes nothing"),
        ("a\n{{ 1", "t:2: `{{` without `}}`"),
        ("{{ \"a }}", "t:1: `{{` without `}}`"),
        ("{{ break }}", "t:1: `break` is not supported"),
        ("{{ .a ! }}", "t:1: `!` is not understood"),
        ("{{ .a 1 }}", "t:1: what is no function takes no arguments"),
        ("{{ a.b }}", "t:1: `a.b` is no function"),
    ] {
        assert_eq!(render(template, &data).unwrap_err(), want, "{template}");
    }
    let deep = "{{ if true }}".repeat(100);
    assert_eq!(render(&deep, &data).unwrap_err(), "t:1: nested too deeply");
}
