{{- /* What several files say. Objects live in istio-system whatever the release's namespace: proxies know Pilot and Auth by it. */ -}}

{{- define "lateen.namespace" -}}
istio-system
{{- end -}}

{{- define "lateen.rev" -}}
{{ .Values.revision | default "default" }}
{{- end -}}

{{- /* `pilot`, or `pilot-REVISION`. */ -}}
{{- define "lateen.pilot" -}}
{{ if .Values.revision }}pilot-{{ .Values.revision }}{{ else }}pilot{{ end }}
{{- end -}}

{{- define "lateen.image" -}}
{{ .root.Values.image.hub }}/{{ .name }}:{{ .root.Values.image.tag | default .root.Chart.AppVersion }}
{{- end -}}

{{- define "lateen.labels" -}}
app.kubernetes.io/name: {{ .name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: lateen
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
istio.io/rev: {{ include "lateen.rev" .root }}
{{- end -}}

{{- /* Who Auth is, and how this program proves who it is itself: flags and volumes. */ -}}
{{- define "lateen.identity.args" -}}
- --auth-address=auth.{{ include "lateen.namespace" . }}.svc:8060
- --auth-root=/var/run/secrets/istio/root-cert.pem
- --auth-id=spiffe://{{ .Values.trustDomain }}/ns/{{ include "lateen.namespace" . }}/sa/auth
- --join-token-file=/var/run/secrets/tokens/istio-token
- --svid-dir=/var/lib/lateen/svid
{{- end -}}

{{- define "lateen.identity.mounts" -}}
- { name: roots, mountPath: /var/run/secrets/istio, readOnly: true }
- { name: token, mountPath: /var/run/secrets/tokens, readOnly: true }
- { name: svid, mountPath: /var/lib/lateen }
{{- end -}}

{{- define "lateen.identity.volumes" -}}
- name: roots
  configMap: { name: istio-ca-root-cert }
- name: token
  projected:
    sources:
    - serviceAccountToken: { audience: istio-ca, expirationSeconds: 43200, path: istio-token }
- name: svid
  emptyDir: { medium: Memory, sizeLimit: 4Mi }
{{- end -}}

{{- define "lateen.container.security" -}}
securityContext:
  allowPrivilegeEscalation: false
  capabilities: { drop: [ALL] }
  privileged: false
  readOnlyRootFilesystem: true
{{- end -}}

{{- /* Of a pod: as whom, and where. `c` has the component's values, `app` its label. */ -}}
{{- define "lateen.pod" -}}
securityContext:
  runAsNonRoot: true
  runAsUser: 1337
  runAsGroup: 1337
  fsGroup: 1337
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: { type: RuntimeDefault }
{{- if .root.Values.priorityClasses.enabled }}
priorityClassName: {{ .priority }}
{{- end }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
- name: {{ . }}
{{- end }}
{{- end }}
topologySpreadConstraints:
{{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
- maxSkew: 1
  topologyKey: {{ . }}
  whenUnsatisfiable: ScheduleAnyway
  labelSelector:
    matchLabels: { app: {{ $.app }}, istio.io/rev: {{ include "lateen.rev" $.root }} }
{{- end }}
{{- with .c.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .c.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .c.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- /* HTTP on the port of health. */ -}}
{{- define "lateen.probes" -}}
startupProbe:
  httpGet: { path: /healthz/live, port: http-monitoring }
  periodSeconds: 1
  failureThreshold: 60
livenessProbe:
  httpGet: { path: /healthz/live, port: http-monitoring }
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  httpGet: { path: /healthz/ready, port: http-monitoring }
  periodSeconds: 3
  timeoutSeconds: 5
{{- end -}}

{{- /* Replicas of a Deployment, unless an autoscaler sets them. */ -}}
{{- define "lateen.replicas" -}}
{{- if not (and .autoscaling .autoscaling.enabled) -}}
replicas: {{ .replicas }}
{{- end -}}
{{- end -}}

{{- /* The autoscaler and the disruption budget of the Deployment `name`. */ -}}
{{- define "lateen.scaling" -}}
{{- $least := .scale.replicas -}}
{{- if and .scale.autoscaling .scale.autoscaling.enabled }}
{{- $least = .scale.autoscaling.minReplicas }}
---
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  name: {{ .name }}
  namespace: {{ include "lateen.namespace" .root }}
  labels:
    {{- include "lateen.labels" . | nindent 4 }}
spec:
  scaleTargetRef: { apiVersion: apps/v1, kind: Deployment, name: {{ .name }} }
  minReplicas: {{ .scale.autoscaling.minReplicas }}
  maxReplicas: {{ .scale.autoscaling.maxReplicas }}
  metrics:
  - type: Resource
    resource:
      name: cpu
      target: { type: Utilization, averageUtilization: {{ .scale.autoscaling.cpuPercent }} }
{{- end }}
{{- if and .scale.disruptionBudget.enabled (gt (int $least) 1) }}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ .name }}
  namespace: {{ include "lateen.namespace" .root }}
  labels:
    {{- include "lateen.labels" . | nindent 4 }}
spec:
  maxUnavailable: {{ .scale.disruptionBudget.maxUnavailable }}
  selector:
    matchLabels: { app: {{ .app }}, istio.io/rev: {{ include "lateen.rev" .root }} }
{{- end }}
{{- end -}}
