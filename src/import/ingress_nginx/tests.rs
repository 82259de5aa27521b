use std::fs;

use super::*;
use crate::config::load::{load, load_list};
use crate::config::tests::{assert_golden, yaml_files};

const DATA: &str = "tests/data/import";

#[test]
fn what_is_written_can_be_used_and_what_is_left_out_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("serin.yaml");
    for manifests in yaml_files(DATA) {
        let Imported {
            config,
            notes,
            mending,
        } = import(&fs::read_to_string(&manifests).unwrap()).unwrap();
        assert_eq!(mending, Vec::<String>::new());
        assert_golden(&manifests.with_extension("serin"), &config);
        assert_golden(
            &manifests.with_extension("notes"),
            &(notes.join("\n") + "\n"),
        );
        fs::write(&file, &config).unwrap();
        let loaded = load(&file, &mut load_list);
        loaded.unwrap_or_else(|problems| panic!("{}", problems.render(false)));
    }
}

#[test]
fn what_is_no_manifest_is_an_error() {
    for (text, words) in [
        ("", "holds no Ingress"),
        ("a: b", "holds no Ingress"),
        ("a: [", "is no YAML"),
        (
            "kind: Service\napiVersion: v1\nmetadata: { name: a }",
            "holds no Ingress",
        ),
        (
            "kind: Ingress\napiVersion: networking.k8s.io/v1\nmetadata: { name: a }\nspec: { rules: 1 }",
            "holds the Ingress a: invalid type",
        ),
    ] {
        let error = import(text).unwrap_err();
        assert!(error.contains(words), "{text:?}: {error}");
    }
}

#[test]
fn what_serin_cannot_use_is_told_as_check_would_tell_it() {
    let manifest = "kind: Ingress
apiVersion: networking.k8s.io/v1
metadata: { name: a }
spec:
  rules:
    - host: a_b.example.com
      http: { paths: [ { path: /a/../b, pathType: Exact, backend: { service: { name: s, port: { number: 80 } } } } ] }
";
    let mending = import(manifest).unwrap().mending;
    assert_eq!(mending.len(), 2, "{mending:#?}");
    assert!(mending[0].starts_with("line ") && mending[0].contains("a_b.example.com"));
    assert!(mending[1].contains("/a/../b"), "{mending:#?}");
    let only_canary = manifest.replace(
        "name: a }",
        "name: a, annotations: { nginx.ingress.kubernetes.io/canary: 'true' } }",
    );
    assert!(
        import(&only_canary)
            .unwrap_err()
            .contains("but for canaries")
    );
}

#[test]
fn sizes_of_nginx_are_sizes_of_kubernetes() {
    for (nginx, expected) in [
        ("8m", Some("8Mi")),
        ("64K", Some("64Ki")),
        ("1g", Some("1Gi")),
        ("100", Some("100")),
        ("0", None),
        ("8mb", None),
        ("", None),
    ] {
        assert_eq!(body_size(nginx).as_deref(), expected, "{nginx}");
    }
}
