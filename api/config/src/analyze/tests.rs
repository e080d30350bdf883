use super::*;

fn run(text: &str, only: &str) -> Vec<String> {
    let input = Input {
        resources: Resource::read("a.yaml", text).unwrap(),
        ..Input::default()
    };
    let only: Vec<String> = Some(only.to_owned())
        .into_iter()
        .filter(|name| !name.is_empty())
        .collect();
    analyze(&input, &only)
        .iter()
        .map(|message| {
            format!(
                "{}:{} {} {}: {}",
                message.file, message.line, message.code, message.resource, message.text
            )
        })
        .collect()
}

const ROUTES: &str = "
apiVersion: v1
kind: Service
metadata: { name: reviews, namespace: prod }
spec: { selector: { app: reviews }, ports: [{ name: http, port: 80 }, { name: http-b, port: 81 }] }
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: r, namespace: prod }
spec:
  hosts: [reviews]
  gateways: [mesh, g]
  http:
  - route:
    - destination: { host: reviews }
    - destination:
        host: nobody
        subset: v1
";

#[test]
fn names_that_nobody_defines_are_told_with_their_line() {
    assert_eq!(
        run(ROUTES, ""),
        [
            "a.yaml:11 IST0132 VirtualService prod/r: Gateway prod/g has no server for any of reviews",
            "a.yaml:12 IST0101 VirtualService prod/r: there is no Gateway prod/g",
            "a.yaml:14 IST0106 VirtualService prod/r: spec.http[0].route: the weights add up to 0; give at least one destination a weight",
            "a.yaml:15 IST0112 VirtualService prod/r: host reviews has several ports; name one in port.number",
            "a.yaml:17 IST0101 VirtualService prod/r: host nobody is offered by no Service or ServiceEntry that is visible here",
            "a.yaml:18 IST0101 VirtualService prod/r: subset v1 of nobody is defined by no DestinationRule",
        ]
    );
}

#[test]
fn one_analyzer_can_be_asked() {
    assert_eq!(
        run(ROUTES, "virtualservice.DestinationRuleAnalyzer"),
        [
            "a.yaml:18 IST0101 VirtualService prod/r: subset v1 of nobody is defined by no DestinationRule"
        ]
    );
}

#[test]
fn items_of_a_list_are_resources() {
    let text = "
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Namespace
  metadata:
    name: shop
";
    let said = run(text, "");
    assert_eq!(said.len(), 1);
    assert!(
        said[0].starts_with("a.yaml:7 IST0102 Namespace shop: "),
        "{said:?}"
    );
}

#[test]
fn what_is_not_yaml_has_a_line() {
    let error = Resource::read("a.yaml", "a: 1\nb: [\nc: 2\n").unwrap_err();
    assert!(error.line >= 2, "{error:?}");
}
